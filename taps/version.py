"""The version of this library."""

VERSION = "0.14.0"
