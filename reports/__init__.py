"""The report generator: tables, figures, templates."""
