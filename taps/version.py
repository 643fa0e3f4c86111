"""The version of this library."""

VERSION = "0.16.1"
