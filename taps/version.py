"""The version of this library."""

VERSION = "0.10.0"
