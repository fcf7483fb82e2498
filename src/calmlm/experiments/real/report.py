def write_report(settings, result, output):
    return []
