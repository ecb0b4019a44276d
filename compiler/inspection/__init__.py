"""`regcache inspect`, of an encoder's blocks and outliers, and `regcache doctor`, of a machine."""
