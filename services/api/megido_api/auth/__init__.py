"""Authentication attempts that older capture tools post."""
