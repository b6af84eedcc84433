def read_references(layout):
    return None
