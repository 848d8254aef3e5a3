"""quantize/solvers"""
