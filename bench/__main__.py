"""`python -m bench NAME`: the measurements that README and docs quote."""

from bench.environments import main

if __name__ == "__main__":
    main()
