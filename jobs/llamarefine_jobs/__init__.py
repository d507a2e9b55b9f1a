"""What runs inside the containers: the contract, the store, and one module per stage."""

__version__ = "0.1.0"
