"""The nodes that said something of themselves."""
