"""The version of this library."""

VERSION = "0.22.0"
