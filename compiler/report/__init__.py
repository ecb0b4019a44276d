"""`regcache report`: one page that shows what was compiled, and why."""
