"""The ports that ship with the project: one folder for each platform that has code of its own."""
