"""The report: its page (``page/`` holds what that is made from), figures and tables beside it."""
