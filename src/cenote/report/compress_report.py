def write_report(result, path): return path
