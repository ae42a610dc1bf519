"""Looking at datasets before (and after) they are cached."""
