"""Write a network as one C99 source file with sparse tables and no heap."""
