"""The same work by other projects' software, each in an environment of its own: README.md says how to run it."""
