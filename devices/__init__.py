"""Known devices, one TOML file each; `skipcat_edge.device` describes and reads them (data only)."""
