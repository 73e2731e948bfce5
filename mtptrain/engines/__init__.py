"""How the parameters of a module are trained by one process or by many: replicated, or shared by ZeRO."""
