"""Replays: jobs for the replayer, and waiting for their result."""
