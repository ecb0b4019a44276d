"""`python -m regcache.compiler` is `regcache`."""

from regcache.compiler.cli import main

if __name__ == "__main__":
    main()
