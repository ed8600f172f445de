"""From a resolved config to running ranks, and run.json's last word about them. Does not compose, and does
not train."""
