"""Formats, names and rules that stages and launcher share. Imports the standard library and pydantic only."""
