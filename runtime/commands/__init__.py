"""The subcommands of `vmad`, one file each."""
