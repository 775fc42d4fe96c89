"""The scripts of tfopt: thin, flags in and exit code out."""
