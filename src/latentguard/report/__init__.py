"""Reports: tables and figures as HTML, JSON, CSV and pictures."""
