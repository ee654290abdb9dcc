"""`suite bench`: the same sweep in one sitting, as people run it today, that tuned, and by this suite."""
