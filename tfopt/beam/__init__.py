"""What outgrows one machine, on Apache Beam; the rest of tfopt does not import it."""
