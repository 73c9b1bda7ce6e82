"""DAR in other trainers: each adapter is an extra, and says at import which versions it was tested with."""
