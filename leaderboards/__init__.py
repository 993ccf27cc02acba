"""Tables, curves and verdicts, drawn from the records that runs leave behind."""
