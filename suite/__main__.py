"""`python -m suite` is the `suite` command."""

from suite.cli import main

if __name__ == "__main__":
    main()
