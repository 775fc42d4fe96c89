"""Side-by-side measurements of tfopt against its peers; never run by the tests."""
