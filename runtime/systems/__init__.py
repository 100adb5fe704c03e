"""Published methods as compositions of stages, one file each."""
