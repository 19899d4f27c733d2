"""Other people's tables beside ours."""
