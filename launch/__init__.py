"""Jobs: read a config, call the library, write results. No algorithm lives here."""
