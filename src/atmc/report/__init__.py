"""Write one self-contained HTML page per run; takes plain values and knows no configuration."""
