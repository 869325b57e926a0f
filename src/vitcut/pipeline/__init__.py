"""Walking the stages: the verbs of the command line and of the Python API."""
