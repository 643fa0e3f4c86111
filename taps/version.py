"""The version of this library."""

VERSION = "0.21.0"
