"""Each line of the security model with its tests: `test_s01_…` is line 1, and so on."""
