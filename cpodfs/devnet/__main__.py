"""``python -m cpodfs.devnet``."""

from cpodfs.devnet.cli import devnet

if __name__ == "__main__":
    devnet(prog_name="python -m cpodfs.devnet")
