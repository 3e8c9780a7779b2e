"""The typed configuration: its groups, and the binding of YAML to dataclasses."""
