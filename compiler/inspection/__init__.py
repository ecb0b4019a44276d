"""`regcache inspect`: the blocks of an encoder and where its outliers stand."""
