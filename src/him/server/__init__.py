"""Faces of a repository that stay running: so far the warm daemon behind the command line."""
