"""`python -m regcache` is `regcache`."""

from regcache.compiler.cli.main import main

if __name__ == "__main__":
    main()
