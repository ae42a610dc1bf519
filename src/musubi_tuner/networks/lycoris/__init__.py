"""Networks of the LyCORIS library, in this trainer's shape."""
