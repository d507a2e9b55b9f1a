"""What the stages and the launcher agree on. Imports the standard library and pydantic only."""
