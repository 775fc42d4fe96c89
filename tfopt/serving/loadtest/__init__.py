"""A load test of any server that speaks TensorFlow Serving's gRPC or REST.

plan.py says what is asked, arrivals.py when requests are due, engine.py sends them over a transport, result.py holds
what came of it; sweep.py looks for the knee; text.py and page.py show it.
"""
