"""Tests of the replayer on a real database and a real bus."""
