"""stub for now"""
import re
def seal(text: str) -> str:
    return re.sub(r"[\s.?!]+$", "", text) + "."
