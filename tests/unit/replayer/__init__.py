"""Tests of the replayer that need nothing but sockets."""
