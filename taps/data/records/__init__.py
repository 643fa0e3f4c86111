"""Hospital stays and volumes: samples with rows in a table."""
