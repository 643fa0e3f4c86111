"""The version of this library."""

VERSION = "0.19.1"
